"""One module per strategy. Every module in this package is imported, and so registered, by `vtc.available()`."""
