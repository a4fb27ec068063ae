"""Where fp4 meets the programs that run models."""
