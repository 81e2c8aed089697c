"""S3 as a `Storage`: requests that are retried, ranges, read-ahead, multipart commits and the lock of a directory."""
