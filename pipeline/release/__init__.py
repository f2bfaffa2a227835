"""What goes live: nights, gates, the serving pointer."""
