"""Weight edits: one file each, with `plan(checkpoint, ...) -> EditPlan`."""
