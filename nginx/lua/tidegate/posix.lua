--- The few calls of libc that neither Lua nor ngx_lua offers.
--
-- Why: signals, symbolic links, fsync and address parsing exist in every libc, while nginx's own
-- helpers for them differ between builds. Nothing here knows what Tidegate is.

local ffi = require "ffi"

local C = ffi.C
local ffi_new = ffi.new
local ffi_string = ffi.string
local concat = table.concat
local io_open = io.open
local os_rename = os.rename
local os_remove = os.remove
local tonumber = tonumber

-- ngx_lua declares some of these too, under the same prototypes.
pcall(ffi.cdef, "int kill(int pid, int sig);")
pcall(ffi.cdef, "int symlink(const char *target, const char *path);")
pcall(ffi.cdef, "ssize_t readlink(const char *path, char *buf, size_t size);")
pcall(ffi.cdef, "int mkdir(const char *path, unsigned int mode);")
pcall(ffi.cdef, "int open(const char *path, int flags, ...);")
pcall(ffi.cdef, "int close(int fd);")
pcall(ffi.cdef, "int fsync(int fd);")
pcall(ffi.cdef, "long lseek(int fd, long offset, int whence);")
pcall(ffi.cdef, "void *mmap(void *addr, size_t len, int prot, int flags, int fd, long offset);")
pcall(ffi.cdef, "int munmap(void *addr, size_t len);")
pcall(ffi.cdef, "int access(const char *path, int mode);")
pcall(ffi.cdef, "int usleep(unsigned int microseconds);")
pcall(ffi.cdef, "int statx(int fd, const char *path, int flags, unsigned int mask, void *buf);")
pcall(ffi.cdef, "int fcntl(int fd, int cmd, ...);")
pcall(ffi.cdef, "int getdtablesize(void);")
pcall(ffi.cdef, "long syscall(long number, ...);")
pcall(ffi.cdef, "size_t strlen(const char *text);")
pcall(ffi.cdef, "char *strerror(int errnum);")
pcall(ffi.cdef, "int inet_pton(int af, const char *src, void *dst);")
pcall(ffi.cdef, "const char *inet_ntop(int af, const void *src, char *dst, unsigned int size);")

local AF_INET = 2
local AF_INET6 = 10
local AT_FDCWD = -100
local STATX_BASIC = 0x7ff
local EPERM = 1
local ENOENT = 2
local SEEK_END = 2
local PROT_READ = 1
local MAP_PRIVATE = 2
local ENOTDIR = 20
local EEXIST = 17
local F_SETFD = 2
local FD_CLOEXEC = 1
local SYS_CLOSE_RANGE = 436
local CLOSE_RANGE_CLOEXEC = 4

local _M = { SIGHUP = 1 }

local address_buffer = ffi_new("unsigned char[16]")
local text_buffer = ffi_new("char[64]")
local path_buffer = ffi_new("char[4096]")
local stat_buffer = ffi_new("char[256]")


local function failure(what)
    return nil, what .. ": " .. ffi_string(C.strerror(ffi.errno()))
end


local function statx(path)
    return C.statx(AT_FDCWD, path, 0, STATX_BASIC, stat_buffer)
end


--- Sends `signal` to process `pid`.
function _M.kill(pid, signal)
    if C.kill(pid, signal) ~= 0 then
        return failure("kill " .. pid)
    end
    return true
end


--- Whether process `pid` exists.
function _M.alive(pid)
    return C.kill(pid, 0) == 0 or ffi.errno() == EPERM
end


--- Target of the symbolic link at `path`, or nil.
function _M.readlink(path)
    local size = tonumber(C.readlink(path, path_buffer, 4096))
    if size < 0 then
        return failure(path)
    end
    return ffi_string(path_buffer, size)
end


--- Makes `path` a symbolic link to `target` in one step, whatever it linked to before.
function _M.switch_link(target, path)
    local new = path .. ".new"
    os_remove(new)
    if C.symlink(target, new) ~= 0 then
        return failure(new)
    end
    return os_rename(new, path)
end


--- Makes the directory `path`; one that is there already is fine.
function _M.mkdir(path)
    if C.mkdir(path, 448) ~= 0 and ffi.errno() ~= EEXIST then
        return failure(path)
    end
    return true
end


--- Flushes the file or directory at `path` to disk.
function _M.fsync(path)
    local fd = C.open(path, 0)
    if fd < 0 then
        return failure(path)
    end
    local result = C.fsync(fd)
    C.close(fd)
    if result ~= 0 then
        return failure(path)
    end
    return true
end


local function put(path, mode, data)
    local file, err = io_open(path, mode)
    if not file then
        return nil, err
    end
    local ok
    ok, err = file:write(data)
    if not ok then
        file:close()
        return nil, err
    end
    ok, err = file:close()
    if not ok then
        return nil, err
    end
    return true
end


--- Writes `data` to `path`; the old content is gone even if this fails.
function _M.write(path, data)
    return put(path, "wb", data)
end


--- Adds `data` to the file at `path`.
function _M.append(path, data)
    return put(path, "ab", data)
end


--- Adds `data` to the log at `path`, which has `size` bytes as yet (0: it is begun), and syncs it.
-- One of another size has been torn, and is left as it is.
function _M.log(path, data, size)
    local file, err = io_open(path, size == 0 and "wb" or "ab")
    if not file then
        return nil, err
    end
    local ok = file:seek("end") == size
    if not ok then
        file:close()
        return nil, path .. " is not as long as it was"
    end
    ok, err = file:write(data)
    local closed, fault = file:close()
    if not ok or not closed then
        return nil, err or fault
    end
    ok, err = _M.fsync(path)
    if ok and size == 0 then
        ok, err = _M.fsync((path:gsub("/[^/]*$", "")))
    end
    return ok, err
end


--- Syncs the file `new` and puts it in the place of `target`, which stays as `target.prev`, and so
-- does its log.
function _M.publish(new, target)
    local ok, err = _M.fsync(new)
    if not ok then
        return nil, err
    end
    os_rename(target .. ".log", target .. ".log.prev")
    os_rename(target, target .. ".prev")
    ok, err = os_rename(new, target)
    if ok then
        _M.fsync((target:gsub("/[^/]*$", "")))
    end
    return ok, err
end


--- Waits up to `seconds` for `publish(new, …)`, which another thread has begun, to end.
function _M.await_published(new, seconds)
    for _ = 1, seconds * 200 do
        if C.access(new, 0) ~= 0 then
            return
        end
        C.usleep(5000)
    end
end


--- Content of the file at `path`, in memory that is not Lua's; there until it is given up, or not
-- referenced any more.
-- @return bytes, their number and a function that gives them up; or nil and why. A file without
--   content cannot be had.
function _M.map(path)
    local fd = C.open(path, 0)
    if fd < 0 then
        return failure(path)
    end
    local size = tonumber(C.lseek(fd, 0, SEEK_END))
    local memory = C.mmap(nil, size, PROT_READ, MAP_PRIVATE, fd, 0)
    C.close(fd)
    if ffi.cast("intptr_t", memory) == -1 then
        return failure(path)
    end
    local bytes = ffi.gc(ffi.cast("const uint8_t *", memory), function()
        C.munmap(memory, size)
    end)
    return bytes, size, function()
        ffi.gc(bytes, nil)
        C.munmap(memory, size)
    end
end


--- Whole content of the file at `path`.
function _M.read(path)
    local file, err = io_open(path, "rb")
    if not file then
        return nil, err
    end
    local data
    data, err = file:read("*a")
    file:close()
    return data, err
end


--- Whole content of the file at `path`, with its inode, size and times read before it.
-- @return content and stamp; or nil, why not, and whether that is because there is none
function _M.read_stamped(path)
    local stamp, err, missing = _M.stamp(path)
    if not stamp then
        return nil, err, missing
    end
    local data
    data, err = _M.read(path)
    if not data then
        return nil, err
    end
    return data, stamp
end


--- What changes when the file at `path` does: inode, size and times; its content on a libc that
-- cannot tell these.
-- @return a string; or nil, why not, and whether that is because there is none
function _M.stamp(path)
    local ok, result = pcall(statx, path)
    if not ok then
        return _M.read(path)
    end
    if result ~= 0 then
        local errno = ffi.errno()
        local _, err = failure(path)
        return nil, err, errno == ENOENT or errno == ENOTDIR
    end
    -- In struct statx: inode and size at 32, ctime and mtime at 96.
    return ffi_string(stat_buffer + 32, 16) .. ffi_string(stat_buffer + 96, 32)
end


--- Keeps the files and connections of this process from being inherited by a child it starts.
--
-- A child that held a copy of a client's connection would keep it open after we closed it.
function _M.close_on_exec()
    local ok, result = pcall(C.syscall, SYS_CLOSE_RANGE, ffi_new("unsigned int", 3),
                             ffi_new("unsigned int", 0xffffffff),
                             ffi_new("unsigned int", CLOSE_RANGE_CLOEXEC))
    if ok and tonumber(result) == 0 then
        return
    end
    for fd = 3, C.getdtablesize() - 1 do
        C.fcntl(fd, F_SETFD, ffi_new("int", FD_CLOEXEC))
    end
end


--- Reads an IPv4 or IPv6 address.
-- @return 4 or 6, and its 4 or 16 bytes; nil where it is none
function _M.parse_address(text)
    if #text > 45 or tonumber(C.strlen(text)) ~= #text then
        return nil
    end
    if C.inet_pton(AF_INET, text, address_buffer) == 1 then
        return 4, ffi_string(address_buffer, 4)
    end
    if C.inet_pton(AF_INET6, text, address_buffer) == 1 then
        return 6, ffi_string(address_buffer, 16)
    end
    return nil
end


--- Text of an address given as bytes (string or pointer).
function _M.format_address(family, bytes)
    C.inet_ntop(family == 6 and AF_INET6 or AF_INET, bytes, text_buffer, 64)
    return ffi_string(text_buffer)
end


--- `text` as one word for the shell.
function _M.quote(text)
    return concat({ "'", (text:gsub("'", "'\\''")), "'" })
end


return _M
