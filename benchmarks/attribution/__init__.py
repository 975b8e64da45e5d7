"""The attribution of a pair's loss to its sources: maps with and without each constraint."""
