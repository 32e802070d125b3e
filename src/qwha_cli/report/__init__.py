"""What a run did, for people: collected from its artifacts, drawn, written as report.md and one self-contained report.html."""
