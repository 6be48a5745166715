"""Image nets and their parts."""
