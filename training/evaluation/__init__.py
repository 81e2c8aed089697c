"""What a model is worth: measures of its samples and of its predictions, and the job that takes them."""
