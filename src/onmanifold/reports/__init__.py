"""What people look at: tables, figures, claims with their verdicts, and the HTML page."""
