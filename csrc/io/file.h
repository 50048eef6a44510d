// A file that blocks are read from and written to, past the page cache (O_DIRECT) where the file system serves that.
//
// Direct io wants offsets, sizes and memory aligned to the device's block. Memory that is not, which is the rule (torch
// aligns to 64 bytes), goes through an aligned buffer that the caller lends. Reads into memory always do: a fork during a
// direct read into private memory may lose what was read (open(2)). Writes from aligned memory go as they are.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace trilith::io {

constexpr int64_t kAlignment = 4096;

inline int64_t round_up(int64_t num_bytes) { return (num_bytes + kAlignment - 1) / kAlignment * kAlignment; }

// What became of a transfer: the bytes that were moved and an errno; 0 with fewer bytes than asked for: the file ends.
struct Moved {
    int64_t num_bytes;
    int error;
};

using Copy = std::function<void(void* to, const void* from, int64_t num_bytes)>;

// The system calls, so that a test can have them fail or move less than asked for.
struct SystemCalls {
    ssize_t (*pread)(int, void*, size_t, off_t) = ::pread;
    ssize_t (*pwrite)(int, const void*, size_t, off_t) = ::pwrite;
    int (*fsync)(int) = ::fsync;
};

class File {
  public:
    // Descriptors that stay the caller's and outlive the file; `direct` is opened with O_DIRECT, or -1. With `owns_padding`
    // what follows a block up to the next multiple of kAlignment belongs to it, and may be overwritten.
    File(int descriptor, int direct, bool owns_padding, std::string path, SystemCalls calls = {});
    // Opens `path`, made if it is to be written and does not exist. Throws std::system_error that names it.
    static std::shared_ptr<File> open(const std::string& path, bool writable, bool direct, SystemCalls calls = {});
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    // `buffer` is aligned memory of round_up(num_bytes) bytes, or null where the file is not direct; `copy` fills and empties
    // it.
    Moved write(const void* memory, int64_t num_bytes, int64_t offset, void* buffer, const Copy& copy) const;
    Moved read(void* memory, int64_t num_bytes, int64_t offset, void* buffer, const Copy& copy) const;
    int sync() const;  // all that was written is on the disk; returns an errno

    // From now on a file shorter than this was cut short by something else: a write then fails like a read behind the end.
    void require_bytes(int64_t num_bytes) { required_bytes_ = num_bytes; }
    bool is_direct() const { return direct_ >= 0; }
    const std::string& path() const { return path_; }

  private:
    template <class Call, class Byte>
    Moved move(Call call, int descriptor, Byte* memory, int64_t num_bytes, int64_t offset, bool is_write) const;

    bool refused(const Moved& moved) const;

    int descriptor_, direct_;
    bool owns_padding_, is_ours_ = false;
    std::string path_;
    SystemCalls calls_;
    std::atomic<int64_t> required_bytes_{0};
};

}  // namespace trilith::io
