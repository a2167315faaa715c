"""What a run reports: metrics, summaries, throughput, traces."""
