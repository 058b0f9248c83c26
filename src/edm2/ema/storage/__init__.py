"""What lies on disk: snapshots, their encoding, weighted sums over files, thinning."""
