"""Results of finished trainings: a row for each run in a CSV file, and tables and pictures of the documentation."""
