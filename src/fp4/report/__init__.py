"""What a quantized model is like: statistics of its layers, the model card, and the page of `fp4 report`."""
