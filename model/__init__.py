"""The MaskCLIP method in pure PyTorch: towers, masked branches, losses and the teacher."""
