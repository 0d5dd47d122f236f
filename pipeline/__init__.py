"""defectmap: industrial defect localisation by denoising diffusion, as a batch pipeline on Ray."""
