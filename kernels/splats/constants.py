"""Numbers that decide what an image of Gaussians is, by the names that every backend uses.

Other rasterisers differ in some of them, each by up to 0.01 of a pixel's value where it does.
"""

from __future__ import annotations

ALPHA_CAP = 0.99
"Most that one Gaussian covers of a pixel (gsplat 1.5: 0.999)."

ALPHA_LEAST = 1 / 255
"What covers less of a pixel is not there."

STOP = 1e-4
"Light that is left of a pixel when it is full; the Gaussian that would leave less is not there."

BLUR = 0.3
"Variance of a pixel, in square pixels, that every projected Gaussian is widened by."

NEAR, FAR = 0.01, 1e10
"Depths between which a Gaussian is seen."

BEYOND = 0.3
"How far outside of the image, in its half widths, directions still bend the projection."

DET_LEAST = 1e-10
"Least determinant of a projected covariance."

COMPENSATION_LEAST = 0.005
"Least factor of the opacity of a Gaussian that is narrower than a pixel (antialiased)."

TILE = 16
"Pixels of a tile, each way."
