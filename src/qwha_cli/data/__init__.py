"""Training examples, running text and calibration tokens: one data set a file, each read into the same plain values."""
