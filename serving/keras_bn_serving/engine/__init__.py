"""Models loaded and run; knows no protocol."""
