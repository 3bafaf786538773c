"""The packed model against the dense one, end to end: all but the codes is trained."""
