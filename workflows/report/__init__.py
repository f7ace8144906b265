"""The report of a workspace as one HTML page that needs no network and no other file."""
