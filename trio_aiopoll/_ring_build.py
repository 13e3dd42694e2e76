"""Builds the C core into the extension module ``trio_aiopoll._ring_ffi`` (cffi, API mode); run by setup.py."""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SOURCES = ["_ring.c", "_pool.c", "_polls.c"]

ffibuilder = FFI()
ffibuilder.cdef(
    """
    struct polls;
    struct polls_statistics {
        uint64_t in_flight;
        uint64_t capacity;
        uint64_t rings;
        uint64_t submit_calls;
        uint64_t submitted;
        uint64_t taken;
        uint64_t waited;
        uint64_t blocking_calls;
        uint64_t cancels;
    };
    struct polls *polls_open(int own_fd, int *error);
    long polls_tick(struct polls *polls, const int64_t *keys, long count, int64_t timeout_ns);
    int polls_is_idle(struct polls *polls);
    void polls_set_busy_poll(struct polls *polls, int64_t busy_poll_ns);
    const int64_t *polls_out(struct polls *polls);
    int polls_cancel(struct polls *polls, const int64_t *keys, long count);
    long polls_catch_up(struct polls *polls);
    void polls_close(struct polls *polls);
    int polls_destroy(struct polls *polls);
    void polls_free(struct polls *polls);
    void polls_get_statistics(struct polls *polls, struct polls_statistics *statistics);
    uint32_t pool_idle_count(void);
    """
)
ffibuilder.set_source(
    "trio_aiopoll._ring_ffi",
    '#include "_polls.h"\n#include "_pool.h"\n',
    # relative to the project's root, where setuptools wants them
    sources=[f"trio_aiopoll/{name}" for name in SOURCES],
    depends=[f"trio_aiopoll/{name}" for name in ("_ring.h", "_pool.h", "_polls.h")],
    include_dirs=[str(HERE)],
    extra_compile_args=["-std=c11", "-O2", "-pthread"],
    extra_link_args=["-pthread"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
