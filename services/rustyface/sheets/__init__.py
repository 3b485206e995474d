"""Contact sheets: photos, boxes and scores for people who would rather look."""
