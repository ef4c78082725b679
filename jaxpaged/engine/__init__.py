"""The imperative shell around the pure step: requests, pages, schedule, text."""
