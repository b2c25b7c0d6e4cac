"""OPRD-Bridge, stage 1: the maps that make the layers of two unlike models comparable (OPRD eq. (12)-(13))."""
