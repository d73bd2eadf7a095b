"""The only place that touches private Keras API."""
