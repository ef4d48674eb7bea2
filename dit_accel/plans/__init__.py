"""What a method decides before or during a call: plans, the mask algebra, block masks, tiles."""
