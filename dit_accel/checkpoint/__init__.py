"""What is saved and loaded: settings, learned weights, LoRA adapters."""
