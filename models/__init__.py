"""The maths of one batch on one device."""
