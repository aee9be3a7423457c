"""The gated delta rule: a linear memory that decays, and corrects what it predicts."""
