"""Model files: headers, downloads and the library, quantisation, synthetic models."""
