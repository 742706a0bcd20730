"""What trains in order to measure: arms and cells of a comparison, and the baselines that they are compared with."""
