"""Published laws of losses and sizes."""
