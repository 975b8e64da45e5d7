"""What a pair's loss comes from: maps with and without each published constraint."""
