"""Methods that turn hidden states, so that later ones lose less."""
