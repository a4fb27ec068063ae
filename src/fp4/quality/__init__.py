"""How good a quantized model is: perplexity, statistics of its layers, the report page and the model card."""
