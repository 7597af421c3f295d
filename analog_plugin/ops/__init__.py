"""Pure tensor functions of the analog layer: converters, weight noise, product, clipping."""
