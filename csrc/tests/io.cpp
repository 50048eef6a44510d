// The io queue on temporary files, and on system calls that fail or move less than they were asked to.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <thread>

#include "io/checksum.h"
#include "io/queue.h"
#include "tests/check.h"

namespace trilith::tests {

namespace {

using namespace trilith::io;

constexpr int64_t kBlock = kAlignment;

// The path of a file that is gone at the end.
class Temporary {
  public:
    Temporary() : path_((std::filesystem::temp_directory_path() / "trilith-native-tests-XXXXXX").string()) {
        const int descriptor = ::mkstemp(path_.data());
        check(descriptor >= 0, "a temporary file");
        ::close(descriptor);
    }
    ~Temporary() { ::unlink(path_.c_str()); }
    const std::string& path() const { return path_; }

  private:
    std::string path_;
};

std::vector<char> bytes(int64_t count, uint64_t seed) {
    std::vector<char> found(static_cast<size_t>(count));
    for (size_t i = 0; i < found.size(); ++i) found[i] = static_cast<char>((i * 2654435761u + seed * 97) >> 7);
    return found;
}

Fault finish(Queue& queue, const std::shared_ptr<Operation>& operation) {
    check(queue.wait(*operation, 20000), "an operation ends");
    return queue.fault(*operation);
}
bool is_well(const Fault& fault) { return fault.cause == Cause::none; }

Request request(Kind kind, std::shared_ptr<File> file, std::vector<char>& memory, int64_t offset, int64_t chain = 0) {
    return {kind, std::move(file), memory.data(), static_cast<int64_t>(memory.size()), offset, chain, nullptr, nullptr, 0};
}

void round_trip(bool direct, int depth, int workers, int64_t size, int64_t offset) {
    const std::string what = "io of " + std::to_string(size) + " bytes from " + std::to_string(offset) + (direct ? ", direct" : "");
    Temporary temporary;
    Queue queue(depth, workers, kBlock, "io-test");
    auto file = File::open(temporary.path(), true, direct);
    std::vector<char> before = bytes(size, 1), after(before.size());
    std::vector<uint64_t> sums(before.size() / kBlock + 1);
    Request write = request(Kind::write, file, before, offset);
    write.checksums = sums.data();
    const auto written = queue.submit(write);
    Request read = request(Kind::read, file, after, offset);
    read.checksums = sums.data();
    read.source = written;
    const auto back = queue.submit(read);
    const auto synced = queue.submit(request(Kind::sync, file, before, 0));
    check(is_well(finish(queue, written)) && is_well(finish(queue, back)) && is_well(finish(queue, synced)), what + ": no fault");
    check(before == after, what + ": the bytes come back");
    check(queue.bytes_read() == size && queue.bytes_written() == size, what + ": counted");
    check(queue.wait_all(0), what + ": all is done");
    const int descriptor = ::open(temporary.path().c_str(), O_RDONLY | O_CLOEXEC);
    check(::lseek(descriptor, 0, SEEK_END) == (size ? offset + size : 0), what + ": no more is written");
    ::close(descriptor);
}

// At most this many bytes a call, and every third call is interrupted by a signal.
ssize_t some_read(int descriptor, void* memory, size_t count, off_t offset) {
    static std::atomic<int> calls{0};
    if (++calls % 3 == 0) return errno = EINTR, -1;
    return ::pread(descriptor, memory, std::min<size_t>(count, 5000), offset);
}
ssize_t some_written(int descriptor, const void* memory, size_t count, off_t offset) {
    static std::atomic<int> calls{0};
    if (++calls % 3 == 0) return errno = EINTR, -1;
    return ::pwrite(descriptor, memory, std::min<size_t>(count, 5000), offset);
}
ssize_t broken_read(int, void*, size_t, off_t) { return errno = EIO, -1; }
ssize_t full_write(int descriptor, const void* memory, size_t count, off_t offset) {
    if (offset >= 2 * kBlock) return errno = ENOSPC, -1;
    return ::pwrite(descriptor, memory, count, offset);
}
ssize_t nothing_written(int, const void*, size_t, off_t) { return 0; }
int broken_sync(int) { return errno = EIO, -1; }
int slept_sync(int) {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    return 0;
}

void short_transfers() {
    Temporary temporary;
    Queue queue(3, 2, 4 * kBlock, "io-test");
    SystemCalls calls;
    calls.pread = some_read;
    calls.pwrite = some_written;
    auto file = File::open(temporary.path(), true, false, calls);
    std::vector<char> before = bytes(10 * kBlock + 5, 2), after(before.size());
    check(is_well(finish(queue, queue.submit(request(Kind::write, file, before, 3)))), "io: short writes are continued");
    check(is_well(finish(queue, queue.submit(request(Kind::read, file, after, 3)))), "io: short reads are continued");
    check(before == after, "io: short transfers bring all");
}

void faults() {
    Temporary temporary;
    Queue queue(1, 1, kBlock, "io-test");
    std::vector<char> memory = bytes(4 * kBlock, 3);
    SystemCalls full, broken, stuck;
    full.pwrite = full_write;
    broken.pread = broken_read;
    broken.fsync = broken_sync;
    stuck.pwrite = nothing_written;
    const auto failed = queue.submit(request(Kind::write, File::open(temporary.path(), true, false, full), memory, 0));
    Fault fault = finish(queue, failed);
    check(fault.cause == Cause::moved && fault.moved.error == ENOSPC && fault.start == 2 * kBlock && fault.size == kBlock &&
              fault.moved.num_bytes == 0,
          "io: a full disk, with the block's place");
    check(queue.bytes_written() == 2 * kBlock, "io: what was written before it counts");
    auto plain = File::open(temporary.path(), true, false);
    Request after = request(Kind::read, plain, memory, 0);
    after.source = failed;
    check(finish(queue, queue.submit(after)).cause == Cause::source, "io: what failed to be written is not read");
    auto bad = File::open(temporary.path(), true, false, broken);
    fault = finish(queue, queue.submit(request(Kind::read, bad, memory, 0)));
    check(fault.cause == Cause::moved && fault.moved.error == EIO && fault.start == 0, "io: a broken device");
    check(finish(queue, queue.submit(request(Kind::sync, bad, memory, 0))).moved.error == EIO, "io: a failed sync");
    fault = finish(queue, queue.submit(request(Kind::write, File::open(temporary.path(), true, false, stuck), memory, 0)));
    check(fault.moved.error == ENOSPC, "io: a write of nothing is a full disk");
    std::vector<char> more(6 * kBlock);
    fault = finish(queue, queue.submit(request(Kind::read, plain, more, kBlock + 7)));
    check(fault.cause == Cause::moved && fault.moved.error == 0 && fault.start == 0 && fault.moved.num_bytes == kBlock - 7,
          "io: a file that ends");
    try {
        File::open(temporary.path() + "-absent/file", true, true);
        fail("io: a file in a directory that does not exist");
    } catch (const std::system_error& error) {
        check(error.code().value() == ENOENT && std::strstr(error.what(), "-absent/file"), "io: the path is named");
    }
}

void damage(bool direct) {
    Temporary temporary;
    Queue queue(2, 1, kBlock, "io-test");
    auto file = File::open(temporary.path(), true, direct);
    std::vector<char> memory = bytes(3 * kBlock, 4), back(memory.size());
    uint64_t sums[3];
    Request write = request(Kind::write, file, memory, 0), read = request(Kind::read, file, back, 0);
    write.checksums = read.checksums = sums;
    check(is_well(finish(queue, queue.submit(write))), "io: written");
    const int descriptor = ::open(temporary.path().c_str(), O_RDWR | O_CLOEXEC);
    const char flipped = static_cast<char>(memory[kBlock + 9] ^ 4);
    check(::pwrite(descriptor, &flipped, 1, kBlock + 9) == 1, "io: flipped");
    const Fault fault = finish(queue, queue.submit(read));
    check(fault.cause == Cause::changed && fault.start == kBlock, "io: a flipped bit is seen");
    file->require_bytes(3 * kBlock);
    check(::ftruncate(descriptor, kBlock) == 0, "io: cut");
    const Fault cut = finish(queue, queue.submit(write));
    check(cut.cause == Cause::moved && cut.moved.error == 0 && cut.moved.num_bytes == 0, "io: a file cut short is not written to");
    ::close(descriptor);
}

// A file whose blocks own what follows them, as the offload store has it.
void padded() {
    Temporary temporary;
    const int plain = ::open(temporary.path().c_str(), O_RDWR | O_CLOEXEC);
    const int direct = ::open(temporary.path().c_str(), O_RDWR | O_DIRECT | O_CLOEXEC);
    {
        Queue queue(2, 1, 2 * kBlock, "io-test");
        auto file = std::make_shared<File>(plain, direct, true, temporary.path());
        std::vector<char> before = bytes(5 * kBlock + 100, 5), after(before.size());
        check(is_well(finish(queue, queue.submit(request(Kind::write, file, before, kBlock)))), "io: padded write");
        check(is_well(finish(queue, queue.submit(request(Kind::read, file, after, kBlock)))), "io: padded read");
        check(before == after, "io: padded bytes come back");
        check(::lseek(plain, 0, SEEK_END) == 7 * kBlock || direct < 0, "io: whole pages are written");
    }
    ::close(plain);
    if (direct >= 0) ::close(direct);
}

void order_and_overlap() {
    Temporary temporary;
    Queue queue(4, 2, kBlock, "io-test");
    SystemCalls slow;
    slow.fsync = slept_sync;
    auto file = File::open(temporary.path(), true, false), held = File::open(temporary.path(), true, false, slow);
    std::vector<char> memory = bytes(kBlock, 6), other = memory;
    const auto first = queue.submit(request(Kind::sync, held, memory, 0, 1));
    const auto second = queue.submit(request(Kind::write, file, memory, 0, 1));
    const auto quick = queue.submit(request(Kind::write, file, other, kBlock, 2));
    check(is_well(finish(queue, quick)) && !queue.wait(*second, 0) && !queue.wait(*first, 0), "io: another chain overtakes");
    check(is_well(finish(queue, second)) && queue.wait(*first, 0), "io: a chain keeps its order");
    std::vector<std::vector<char>> written, read;
    for (uint64_t i = 0; i < 50; ++i) written.push_back(bytes(3 * kBlock - 5, i)), read.emplace_back(written.back().size());
    for (size_t i = 0; i < written.size(); ++i) {
        queue.submit(request(Kind::write, file, written[i], 0, 3));
        queue.submit(request(Kind::read, file, read[i], 0, 3));
    }
    queue.stop();
    check(queue.wait_all(0) && written == read, "io: each read sees the write before it, and stop finishes all");
    try {
        queue.submit(request(Kind::read, file, memory, 0));
        fail("io: nothing is taken after stop");
    } catch (const std::logic_error&) {
    }
}

void gate_and_fork() {
    Temporary temporary;
    std::atomic<int> passes{0};
    Queue queue(1, 1, kBlock, "io-test", [&](const Operation& operation) { return operation.request.id == 7 && ++passes == 2 ? EROFS : 0; });
    auto file = File::open(temporary.path(), true, false);
    std::vector<char> memory = bytes(4 * kBlock, 7);
    Request write = request(Kind::write, file, memory, 0);
    write.id = 7;
    const Fault fault = finish(queue, queue.submit(write));
    check(fault.cause == Cause::gate && fault.moved.error == EROFS && fault.start == kBlock && passes == 2, "io: the gate");
    const pid_t child = ::fork();
    if (child == 0) {
        int code = 1;
        try {
            queue.submit(write);
        } catch (const std::logic_error&) {
            code = 0;
        }
        queue.stop();
        ::_exit(code);
    }
    int status = -1;
    ::waitpid(child, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "io: a queue does not outlive a fork");
}

void sleeps() {
    Queue queue(8, 2, kBlock, "io-test");
    const std::clock_t began = std::clock();
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    check(std::clock() - began < CLOCKS_PER_SEC / 20, "io: threads sleep");
}

void checksums() {
    std::vector<char> memory = bytes(5000, 8);
    for (int64_t size : {0, 1, 7, 63, 64, 65, 1023, 1024, 1025, 4999}) {
        std::vector<char> exact(memory.begin(), memory.begin() + size);
        const uint64_t sum = checksum(exact.data(), size);
        check(sum == checksum(memory.data(), size), "checksum: of contents only");
        for (int64_t i = 0; i < size; i += std::max<int64_t>(size / 70, 1)) {
            exact[static_cast<size_t>(i)] = static_cast<char>(exact[static_cast<size_t>(i)] ^ (1 << (i % 8)));
            check(checksum(exact.data(), size) != sum, "checksum: sees each bit");
            exact[static_cast<size_t>(i)] = memory[static_cast<size_t>(i)];
        }
        if (size > 128) {
            std::swap_ranges(exact.begin(), exact.begin() + 64, exact.begin() + 64);
            check(checksum(exact.data(), size) != sum, "checksum: sees stripes change places");
        }
        exact.assign(memory.begin(), memory.begin() + size);
        exact.push_back(0);
        check(checksum(exact.data(), size + 1) != sum, "checksum: sees a zero more");
    }
}

}  // namespace

void test_io() {
    for (bool direct : {false, true})
        for (int64_t size : {int64_t{0}, int64_t{1}, kBlock - 1, kBlock, 5 * kBlock + 77})
            for (int64_t offset : {int64_t{0}, 2 * kBlock, kBlock + 3}) round_trip(direct, size % 3 ? 1 : 4, 1 + size % 2, size, offset);
    short_transfers();
    faults();
    damage(false);
    damage(true);
    padded();
    order_and_overlap();
    gate_and_fork();
    sleeps();
    checksums();
}

}  // namespace trilith::tests
