//! userfaultfd(2) and ioctl_userfaultfd(2).
