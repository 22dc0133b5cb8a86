--- The members of a large JSON object, one by one.
--
-- Why: a membership of 100,000 peers as one value takes a worker a tenth of a second at a stretch
-- and 150 MB, which it never gives back. This finds where each member begins and ends, without
-- looking at what it means: that a member is well-formed says whoever decodes it.

local ffi = require "ffi"
local json = require "tidegate.json"

local ffi_string = ffi.string

local QUOTE, COMMA, COLON, BACKSLASH = 34, 44, 58, 92
local OPEN, CLOSE, OPEN_LIST, CLOSE_LIST = 123, 125, 91, 93
-- Bytes after which others get their turn.
local SLICE = 65536

local _M = {}


local function is_space(byte)
    return byte == 32 or byte == 10 or byte == 13 or byte == 9
end


local function skip(bytes, at, to)
    while at < to and is_space(bytes[at]) do
        at = at + 1
    end
    return at
end


-- Where the string ends that begins at `at`; nil if it does not.
local function string_end(bytes, at, to)
    at = at + 1
    while at < to do
        local byte = bytes[at]
        if byte == QUOTE then
            return at + 1
        end
        at = at + (byte == BACKSLASH and 2 or 1)
    end
    return nil
end


local function scalar_end(bytes, at, to)
    local from = at
    while at < to do
        local byte = bytes[at]
        if byte == COMMA or byte == CLOSE or byte == CLOSE_LIST or is_space(byte) then
            break
        end
        at = at + 1
    end
    return at > from and at or nil
end


-- Where the value ends that begins at `at`; nil if it does not.
local function value_end(bytes, at, to, breathe)
    local first = bytes[at]
    if first == QUOTE then
        return string_end(bytes, at, to)
    elseif first ~= OPEN and first ~= OPEN_LIST then
        return scalar_end(bytes, at, to)
    end
    local depth, pause = 0, at + SLICE
    while at < to do
        local byte = bytes[at]
        if byte == QUOTE then
            at = string_end(bytes, at, to)
            if not at then
                return nil
            end
        else
            at = at + 1
            if byte == OPEN or byte == OPEN_LIST then
                depth = depth + 1
            elseif byte == CLOSE or byte == CLOSE_LIST then
                depth = depth - 1
                if depth == 0 then
                    return at
                end
            end
        end
        if at > pause then
            breathe()
            pause = at + SLICE
        end
    end
    return nil
end


local function fault(at)
    return nil, "it is not well-formed at byte " .. at
end


--- Reads the members of the object in `bytes` from `from` up to before `to`, and nothing else may
-- be there.
-- @param breathe called once in a while
-- @return function that gives the next member: name, where its value begins and where it ends; nil
--   after the last one; nil and why where it is none. nil where this is no object.
function _M.read(bytes, from, to, breathe)
    local at, first = skip(bytes, from, to), true
    if at >= to or bytes[at] ~= OPEN then
        return nil
    end
    at = at + 1
    return function()
        at = skip(bytes, at, to)
        if at < to and bytes[at] == CLOSE then
            at = skip(bytes, at + 1, to)
            if at < to then
                return fault(at)
            end
            return nil
        end
        if not first then
            if at >= to or bytes[at] ~= COMMA then
                return fault(at)
            end
            at = skip(bytes, at + 1, to)
        end
        first = false
        local name_end = at < to and bytes[at] == QUOTE and string_end(bytes, at, to)
        local name = name_end and json.decode(ffi_string(bytes + at, name_end - at))
        if not name then
            return fault(at)
        end
        at = skip(bytes, name_end, to)
        if at >= to or bytes[at] ~= COLON then
            return fault(at)
        end
        local begins = skip(bytes, at + 1, to)
        local ends = begins < to and value_end(bytes, begins, to, breathe)
        if not ends then
            return fault(begins)
        end
        at = ends
        return name, begins, ends
    end
end


return _M
