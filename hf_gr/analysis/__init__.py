"""What can be measured on a trained model: torch alone."""
