"""What tidar.masks shows of a pattern: its mask as text and as a picture, its tiles, its kernels' speed."""
