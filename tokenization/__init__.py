"""Images to codes and back; no Ray, no DeepSpeed."""
