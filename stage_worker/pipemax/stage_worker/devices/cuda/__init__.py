"""A stage on a GPU. Nothing outside this package knows that there are streams and events."""
