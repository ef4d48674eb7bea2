"""What is saved and loaded: settings, learned weights, adapters, and published weights in several formats."""
