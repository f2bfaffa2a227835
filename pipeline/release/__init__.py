"""What goes live: the nightly verdict."""
