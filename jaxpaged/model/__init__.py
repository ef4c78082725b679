"""The functional core: what a model is and what one step of it computes. Arrays in, arrays out."""
