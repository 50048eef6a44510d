#include "io/file.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace trilith::io {

File::File(int descriptor, int direct, bool owns_padding, std::string path, SystemCalls calls)
    : descriptor_(descriptor), direct_(direct), owns_padding_(owns_padding), path_(std::move(path)), calls_(calls) {}

std::shared_ptr<File> File::open(const std::string& path, bool writable, bool direct, SystemCalls calls) {
    const int flags = (writable ? O_RDWR | O_CREAT : O_RDONLY) | O_CLOEXEC;
    const int descriptor = ::open(path.c_str(), flags, 0666);
    if (descriptor < 0) throw std::system_error(errno, std::generic_category(), path);
    int second = -1;
#ifdef O_DIRECT
    // Where the file system does not know direct io, io is buffered.
    if (direct) second = ::open(path.c_str(), (writable ? O_RDWR : O_RDONLY) | O_DIRECT | O_CLOEXEC);
#else
    (void)direct;
#endif
    auto file = std::make_shared<File>(descriptor, second, false, path, calls);
    file->is_ours_ = true;
    return file;
}

File::~File() {
    if (!is_ours_) return;
    ::close(descriptor_);
    if (direct_ >= 0) ::close(direct_);
}

// `call` until all is moved, since the system may move less than it was asked to.
template <class Call, class Byte>
Moved File::move(Call call, int descriptor, Byte* memory, int64_t num_bytes, int64_t offset, bool is_write) const {
    int64_t done = 0;
    while (done < num_bytes) {
        int64_t count = call(descriptor, memory + done, static_cast<size_t>(num_bytes - done), offset + done);
        if (count < 0) {
            if (errno == EINTR) continue;
            return {done, errno ? errno : EIO};
        }
        // Go on at an offset that direct io allows.
        if (descriptor == direct_ && done + count < num_bytes) count -= count % kAlignment;
        if (count == 0) return {done, is_write ? ENOSPC : 0};
        done += count;
    }
    return {done, 0};
}

// Some file systems let a file be opened for direct io and refuse it afterwards; others want more alignment than ours.
bool File::refused(const Moved& moved) const { return moved.error == EINVAL && moved.num_bytes == 0 && !owns_padding_; }

Moved File::write(const void* memory, int64_t num_bytes, int64_t offset, void* buffer, const Copy& copy) const {
    const int64_t required = required_bytes_;
    if (required) {
        // Written behind its end, a file that something cut short would hold zeros where it held data.
        struct stat status;
        if (::fstat(descriptor_, &status)) return {0, errno};
        if (status.st_size < required) return {0, 0};
    }
    const char* source = static_cast<const char*>(memory);
    int64_t direct_bytes = 0;
    if (is_direct() && offset % kAlignment == 0)
        direct_bytes = owns_padding_ ? round_up(num_bytes) : num_bytes / kAlignment * kAlignment;
    Moved moved{0, 0};
    if (direct_bytes) {
        const char* from = source;
        if (reinterpret_cast<uintptr_t>(source) % kAlignment || direct_bytes > num_bytes) {
            copy(buffer, source, std::min(num_bytes, direct_bytes));
            from = static_cast<const char*>(buffer);
        }
        moved = move(calls_.pwrite, direct_, from, direct_bytes, offset, true);
        if (refused(moved))
            direct_bytes = 0;
        else if (moved.num_bytes < direct_bytes)
            return {std::min(moved.num_bytes, num_bytes), moved.error};
    }
    const int64_t done = std::min(direct_bytes, num_bytes);
    moved = move(calls_.pwrite, descriptor_, source + done, num_bytes - done, offset + done, true);
    return {done + moved.num_bytes, moved.error};
}

Moved File::read(void* memory, int64_t num_bytes, int64_t offset, void* buffer, const Copy& copy) const {
    char* target = static_cast<char*>(memory);
    int64_t had = 0;
    if (is_direct() && offset % kAlignment == 0) {
        const Moved moved = move(calls_.pread, direct_, static_cast<char*>(buffer), round_up(num_bytes), offset, false);
        had = std::min(moved.num_bytes, num_bytes);
        copy(target, buffer, had);
        if (!refused(moved) && (moved.error || owns_padding_ || had == num_bytes)) return {had, had < num_bytes ? moved.error : 0};
        // A file without padding may end inside a page, where direct io counts whole pages only.
    }
    const Moved rest = move(calls_.pread, descriptor_, target + had, num_bytes - had, offset + had, false);
    return {had + rest.num_bytes, rest.error};
}

int File::sync() const { return calls_.fsync(descriptor_) ? errno : 0; }

}  // namespace trilith::io
