"""The preflight: what a bundle will take and how fast it will be, before anything is downloaded or exported."""
