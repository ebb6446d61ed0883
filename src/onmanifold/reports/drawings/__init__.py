"""The figures of the analyses, a module for each subject: `draw_...` takes what was measured, gives a figure."""
