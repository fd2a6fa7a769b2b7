"""Planning: what a run will move and hold, by formula."""
