"""The empirical characteristic function of projections: the hot part of SIGReg."""
