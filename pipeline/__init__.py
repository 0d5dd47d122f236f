"""defectmap: industrial defect localisation by denoising diffusion, as a batch pipeline on Ray."""

__version__ = "0.1.0"
